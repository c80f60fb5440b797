"""`python -m cmcgns` is the command `cmcgns`."""

import sys

from cmcgns.commands import main

sys.exit(main())
