"`python -m lmtrain`: the command line."
from .cli import main

main()
