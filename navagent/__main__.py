"""``python -m navagent`` is the ``navagent`` command."""

import sys

from navagent.cli import main

sys.exit(main())
