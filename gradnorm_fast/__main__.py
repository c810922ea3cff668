"""``python -m gradnorm_fast``."""

import sys

try:
    from .cli import main

    code = main()
except KeyboardInterrupt:  # before main could see to it
    print("gradnorm-fast: interrupted", file=sys.stderr)
    code = 130
sys.exit(code)
