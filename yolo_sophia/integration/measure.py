"""What a data set holds, and the time of a training step, for the dry run of `compare`."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path
from typing import Any

from yolo_sophia.integration import ultralytics_yaml

ARCHIVES = (".zip", ".tar", ".gz", ".ndjson")
"""Forms of data that Ultralytics unpacks or converts when it trains."""


def count_images(data: str | Path) -> int:
    """Training images that a data YAML names, as Ultralytics finds them.

    Returns:
        Their number; 0 where it is unknown: some are not there yet (nothing is downloaded), or the YAML is one of
        several data sets for YOLO-World and YOLOE with one that is not in YOLO's format.

    Raises:
        ValueError: As `read_data`.
    """
    return len(image_files(data))


def image_files(data: str | Path, split: str = "train") -> list[str]:
    """Images of a split, in the order in which Ultralytics takes a fraction of them.

    Args:
        data: Path of a data YAML.
        split: "train", "val" or "test".

    Returns:
        Their paths; none where `count_images` is 0.

    Raises:
        ValueError: As `read_data`.
    """
    from ultralytics.data.utils import DATASETS_DIR

    path, content = read_data(data)
    named = content.get(split) or (content.get("validation") if split == "val" else None)
    if path.is_dir() and (path / split).is_dir():  # of classified images
        named = split
    if isinstance(named, dict):
        sets = named["yolo_data"] if list(named) == ["yolo_data"] else []
        return [file for one in sets for file in image_files(one, split)]
    parts = named if isinstance(named, list) else [named] if named else []
    root = Path(content.get("path") or path.parent)
    # Ultralytics 8.3 takes a relative path of a data YAML as one in its folder of data sets.
    for folder in (root, Path(DATASETS_DIR) / root):
        found = [_images_at(folder, part) for part in parts]
        if None not in found:
            return sorted(file for files in found for file in files)
    return []


def _images_at(root: Path, part: str) -> list[str] | None:
    """Images in a folder, linked folders included, or in a list of files; None where there is neither."""
    from ultralytics.data.utils import IMG_FORMATS

    place = (root / part).resolve()
    if not place.exists() and part.startswith("../"):
        place = (root / part[3:]).resolve()  # some exporters write ../train for the folder beside the YAML
    if place.is_dir():
        names = glob.glob(os.path.join(glob.escape(str(place)), "**", "*.*"), recursive=True)
    elif place.is_file():
        lines = place.read_text(encoding="utf-8-sig", errors="replace").strip().splitlines()
        names = [os.path.join(place.parent, line[2:]) if line.startswith("./") else line for line in lines]
    else:
        return None
    return [name for name in names if name.rpartition(".")[-1].lower() in IMG_FORMATS]


def read_data(data: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and content of a data YAML, read as Ultralytics reads it; nothing is downloaded.

    Data without a YAML is described in the same form: a folder of classified images, and an address or archive, the
    content of which is unknown.

    Raises:
        ValueError: There is no such file, or it does not name training images.
    """
    text = str(data).strip()
    try:
        if "://" in text or text.lower().endswith(ARCHIVES):
            return Path(text), {"path": text, "train": "train", "nc": None}
        path = _data_file(text)
        if path.is_dir():
            classes = sorted(place.name for place in path.glob("train/*") if place.is_dir())
            return path, {"path": str(path.resolve()), "train": "train", "names": classes}
        content = ultralytics_yaml.load(path)
        for key, kinds in {"path": (str,), "train": (str, list, dict)}.items():
            value = content.get(key)
            listed = value if isinstance(value, list) else []
            if value is not None and not (isinstance(value, kinds) and all(isinstance(item, str) for item in listed)):
                raise ValueError(f"{key}={value!r}, expected a path{'' if key == 'path' else ' or a list of paths'}")
        if not content["train"]:
            raise ValueError("train is empty, expected a path or a list of paths")
    except Exception as error:  # a damaged file leads to errors of many kinds
        raise ValueError(f"data={data} is no data YAML with a train entry: {type(error).__name__} {error}") from None
    return path, content


def _data_file(text: str) -> Path:
    """The YAML that Ultralytics would take, or a folder that has none."""
    from ultralytics.data.utils import DATASETS_DIR, find_dataset_yaml
    from ultralytics.utils.checks import check_file

    for folder in (Path(text), Path(DATASETS_DIR) / text):
        if text and folder.is_dir():
            return find_dataset_yaml(folder) if any(folder.rglob("*.y*ml")) else folder
    has_suffix = text.lower().endswith((".yaml", ".yml"))
    return Path(check_file(text if has_suffix or os.path.isfile(text) else f"{text}.yaml", download=False))


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
