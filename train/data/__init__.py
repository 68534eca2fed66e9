"""The data to learn from: families of environments, the sources of their data, transitions in memory.

A family is a file with one row per environment (``locomotion.py``); each row lists its sources, the preferred one
first. A source is a file with a subclass of `train.data.spec.Source` (``hosted.py``, ``generated.py``).
``train/environments.py`` collects the families, and ``load.py`` tries an environment's sources.
"""
