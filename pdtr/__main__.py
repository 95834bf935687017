"""``python -m pdtr``: the console script ``pdtr``, for launchers that start modules, such as ``accelerate launch -m``.

The command line lies in a package that this one does not know; the installation says where.
"""

import sys
from importlib.metadata import distribution

if __name__ == "__main__":
    (script,) = distribution("pdtr").entry_points.select(group="console_scripts", name="pdtr")
    sys.exit(script.load()())
