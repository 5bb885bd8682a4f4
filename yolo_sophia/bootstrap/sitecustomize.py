"""Sets the hooks in a child process that has no active `.pth` line; see integration/children.py.

Python imports the first `sitecustomize` on its path at start. This one removes its folder from the path again and
imports the next one, which is the user's.
"""

import importlib
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]
try:
    import yolo_sophia.autoload
except ImportError:  # the parent found the package in another way than by PYTHONPATH
    sys.path.append(_ROOT)
    import yolo_sophia.autoload
yolo_sophia.autoload.start()

_own = sys.modules.pop(__name__)
try:
    importlib.import_module("sitecustomize")
except ImportError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules[__name__] = _own  # the import of this module is under way
