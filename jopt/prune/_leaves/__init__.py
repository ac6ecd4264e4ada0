"""Typed leaves that store a pruned weight in less than its zeros would take."""
