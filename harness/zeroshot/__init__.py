"""What connects this project to lm-evaluation-harness: its tasks on local data, its model class, a cache of results.

Imported only when zero-shot tasks are measured; tables are made without it.
"""
