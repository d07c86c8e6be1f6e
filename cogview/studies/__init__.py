"""Experiments whose figures are asked for: each writes a report, its figures and pictures into a folder."""
