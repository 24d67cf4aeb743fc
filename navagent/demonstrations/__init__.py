"""Demonstrations: recorded as episodes and actions, replayed by the simulator, exchanged through Minari.

``recorded.py`` is the file, ``record.py`` and ``keyboard.py`` make one, ``stream.py`` is what a learner
reads, ``replay.py`` and ``stored.py`` are its two sources, ``features.py`` keeps frozen features,
``minari_exchange.py`` talks to Minari.
"""
