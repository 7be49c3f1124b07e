"""Comparing: arms over paired seeds.

Numbers: paired, ranks (two arms), arms (all of them, described), verdicts (what is decided), planning (seeds needed), sentences.
Trainings: comparison file, what it asks of the driver, runs that exist; answer, page and pictures.
"""
