"""Every option declared once: name, type, group, help, default, choices, range, exclusions.

Nothing here imports torch or transformers, so that help and the check of names answer at once.
"""
