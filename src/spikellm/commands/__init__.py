"""One verb a file: its options, one typed function under ``@verbs.register``, and ``show`` for
people. The command line is derived from them; adding a verb is adding a file.

What verbs are made of lies in ``support`` and is imported when a verb runs: the verbs' own files
import neither torch nor transformers, so that ``--help`` is quick.
"""
