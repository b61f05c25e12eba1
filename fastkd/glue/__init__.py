"""``fastkd.glue``: fine-tunes a model on GLUE and scores it. What each file does:

    evaluation.py    checks everything, then runs what is not finished and writes scores, table, model card and ledger line
      model.py         the model: a run folder, a Hugging Face folder, a hub id or the quickstart teacher
      tasks.py         the tasks: columns, labels, metrics, files;  protocol.py: how all of them are fine-tuned
      examples.py      a split's labelled examples, from files or the hub
      finetune.py      one fine-tuning and the file of its result;  encoded.py: its examples as token ids, in batches
      workers.py       fine-tunings side by side, one process a GPU
      metrics.py       predictions → metrics;  scores.py: metrics over seeds → glue.json and the table
      submission.py    test predictions as gluebenchmark.com takes them

Finished fine-tunings are kept on disk, so that an interrupted evaluation repeats nothing.
"""
