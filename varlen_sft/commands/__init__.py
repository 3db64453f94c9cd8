"""One module per command: ``add_parser`` says what it takes, ``run`` does it.

They are imported for ``--help``, so argparse is all that they import at the top.
"""
