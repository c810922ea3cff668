"""``python -m gradnorm_fast``: the same as the command ``gradnorm-fast``."""

from .cli import main

raise SystemExit(main())
