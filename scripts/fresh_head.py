"""Weights for a fine-tuning that keeps the backbone and neck of trained weights and starts with a new head.

Usage: python scripts/fresh_head.py WEIGHTS.pt MODEL.yaml OUT.pt [seed=0]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ultralytics import YOLO


def main() -> None:
    """Write the checkpoint."""
    words = [w for w in sys.argv[1:] if "=" not in w]
    if len(words) != 3:
        sys.exit(__doc__)
    weights, model, out = words
    torch.manual_seed(int(dict(w.split("=") for w in sys.argv[1:] if "=" in w).get("seed", 0)))
    trained, new = YOLO(weights).model.float(), YOLO(model)
    head = f"model.{len(new.model.model) - 1}."
    kept = {key: value for key, value in trained.state_dict().items() if not key.startswith(head)}
    missing = new.model.load_state_dict(kept, strict=False).missing_keys
    if any(not key.startswith(head) for key in missing):
        sys.exit(
            f"{weights} and {model} differ in more than the head: {[k for k in missing if not k.startswith(head)]}"
        )
    new.model.names = trained.names
    new.save(out)
    print(f"{Path(out).resolve()}: {len(kept)} tensors of {weights}, {len(missing)} new ones in the head")


if __name__ == "__main__":
    main()
