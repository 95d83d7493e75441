"""Random programs through ``neocog.freeze`` and ``torch.compile(backend="neocog")``.

``python -m fuzz --help``. A case is a :class:`fuzz.program.Case`: data that prints as one line and
runs again from it. ``building`` turns it into the source of a module, ``acting`` calls that module
as a user would, plainly and compiled, ``comparing`` says what differs, ``shrinking`` drops what a
finding does not need, and ``__main__`` does all of it in child processes.
"""
