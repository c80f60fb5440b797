"""Find the films and reports nearest to a film or a text: `python jobs/search.py --search.index=FOLDER ...`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("search"))
