"""What there is to learn from: families of environments, the sources of their data, transitions in memory.

A family is a file with the rows of its environments (``locomotion.py``); each row names its sources, the preferred one
first. A source is a file with a subclass of `train.data.spec.Source` (``hosted.py``, ``generated.py``). Families are
collected in ``train/environments.py``, and ``load.py`` goes through an environment's sources.
"""
