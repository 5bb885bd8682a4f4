"""One measured training step, and what a data set holds: the ground of `compare`'s dry run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def count_images(data: str) -> int:
    """Training images that a data YAML names; 0 where they are not there yet (nothing is downloaded) or not counted.

    Not counted are those of a YAML of data sets for YOLO-World and YOLOE, where one of them is not in YOLO's format.

    Raises:
        ValueError: There is no such YAML, or it names no training images.
    """
    from ultralytics.data.utils import DATASETS_DIR, IMG_FORMATS

    path, content = read_data(data)
    train = content["train"]
    if isinstance(train, dict):
        return sum(map(count_images, train["yolo_data"])) if list(train) == ["yolo_data"] else 0
    root = Path(content.get("path") or path.parent)
    root = root if root.is_absolute() or root.is_dir() else Path(DATASETS_DIR) / root
    total = 0
    for part in train if isinstance(train, list) else [train]:
        place = root / part
        if place.is_dir():
            total += sum(file.suffix[1:].lower() in IMG_FORMATS for file in place.rglob("*.*"))
        elif place.is_file():
            total += sum(bool(line.strip()) for line in place.read_text(encoding="utf-8").splitlines())
    return total


def read_data(data: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of a data YAML; nothing is downloaded.

    Raises:
        ValueError: There is no such YAML, or it names no training images.
    """
    import yaml
    from ultralytics.utils.checks import check_file

    try:
        path = Path(check_file(data, download=False))
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["train"]
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"data={data} is no data YAML with a train entry: {type(error).__name__} {error}") from None
    return path, content


def measure_step(model: str, batch: int, size: int, threads: int) -> tuple[float, int, float]:
    """Time the forward and backward pass of one batch of random images.

    Args:
        model: Ultralytics' argument `model`.
        batch: Images.
        size: Height and width in pixels.
        threads: Processor threads that a worker would have.

    Returns:
        Seconds per batch (the second of two), parameters of the model, and its GFLOPs per image.

    Raises:
        ValueError: The model cannot be loaded, or does not take images of this size.
    """
    import torch
    from ultralytics import YOLO
    from ultralytics.utils.checks import check_imgsz
    from ultralytics.utils.torch_utils import get_flops

    torch.set_num_threads(threads)
    try:
        network = YOLO(model).model.train().float()
    except Exception as error:  # of the many kinds that a damaged file, or one of another program, leads to
        raise ValueError(f"model={model} cannot be loaded: {type(error).__name__}: {error}") from None
    stride = max(int(network.stride.max()) if hasattr(network, "stride") else 32, 32)
    size = check_imgsz(size, stride=stride, floor=stride, max_dim=1)
    channels = next((m.in_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)), 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    for p in network.parameters():
        p.requires_grad_(p.is_floating_point())
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        try:
            out = network(torch.rand(batch, channels, size, size, device=device))
            tensors = [v for v in (out.values() if isinstance(out, dict) else out) if isinstance(v, torch.Tensor)]
            sum(t.float().square().mean() for t in tensors).backward()
        except (RuntimeError, ValueError, TypeError) as error:  # out of memory, or a model of another kind
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"model={model}: one step with batch={batch} imgsz={size} failed: {reason}") from None
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, sum(p.numel() for p in network.parameters()), float(get_flops(network, size))
