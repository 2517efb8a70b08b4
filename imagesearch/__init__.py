"""What create.py and search.py share."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # what an older Python can still say
    sys.stderr.write("Python 3.11 or newer is needed; this is Python {}.{}.\n".format(*sys.version_info))
    sys.exit(2)
