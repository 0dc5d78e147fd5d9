"""`accelerate launch -m sd3min.training finetune …`, which is `sd3min finetune …`."""

import sys

from sd3min.cli import main

if __name__ == "__main__":
    sys.exit(main())
