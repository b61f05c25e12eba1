"""Models: one packed encoder for teachers and students, Hugging Face checkpoints in and out.

A teacher's road: ``hf.load`` finds the folder and its tokenizer (``tokenizer.py``, ``weights.py``), the model's file in
``families/`` translates configuration and parameter names, ``encoder.py`` runs it, ``teacher.py`` freezes and cuts it,
``captured.py`` makes a CUDA graph of it. A student is an ``Encoder`` too: ``student.py`` gives its shape and its start, and
``hf.export`` writes it. ``layer.py`` is the post-LN layer, ``attention.py`` chooses the backend of its attention.
"""
