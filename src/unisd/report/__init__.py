"""`unisd report`: a run or a study as one HTML page that needs no network.

It reads what runs and studies have written, nothing else.
"""
