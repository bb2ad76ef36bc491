"""`python -m mmjax`: the command line."""

from mmjax.cli.main import main

raise SystemExit(main())
