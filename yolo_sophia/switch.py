"""Whether the hooks are set at interpreter start. A leaf that imports nothing: autoload and its children read it."""

SWITCH = "YOLO_SOPHIA_AUTOLOAD"
"""Environment variable; with 0 the `.pth` line does nothing."""

started_at_start = False
"""Whether the hooks were set at interpreter start, as they will be in child processes."""
