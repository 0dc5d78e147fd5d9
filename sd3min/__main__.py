"""The commands as `python -m sd3min`."""

import sys

from sd3min.cli import main

sys.exit(main())
