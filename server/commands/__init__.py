"""The commands, a noun a module: some ask a server, the others work on a state folder.

What is slow to import is imported where it is needed: most commands end sooner than that takes.
"""
