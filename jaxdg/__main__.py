"""`python -m jaxdg COMMAND` is `jaxdg COMMAND`."""

from jaxdg.commands import main

main()
