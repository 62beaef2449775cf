"""`python -m jaxopt_models` is the command line."""

from jaxopt_models.cli import main

main()
