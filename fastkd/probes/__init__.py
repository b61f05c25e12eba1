"""``fastkd.probes``: what can be read out of a frozen encoder, with or without an MLM head. What each file does:

    at_end.py        of a run's student, when it is finished
    evaluation.py    checks everything, scores the model and its references, and writes probes.json
      options.py       the options of ``fastkd probe``;  names.py: the probes;  labelled.py: the files that --probe-data names
      subject.py       a model as it is scored: the one that is named, random weights as floor, a teacher as ceiling
      yardstick.py     the items of all probes for one tokenizer, and the scores of an encoder on them
        items.py         texts, the positions in them that are read, and their labels
        tokens.py        the probe ``tokens``: text with masked tokens → items
        pos.py           the probe ``pos``: sentences with parts of speech → items;  conllu.py: the files that hold them
        blimp.py         the probe ``blimp``: minimal pairs, and which sentence of each is likelier
        readout.py       hidden states → the score of each layer;  ridge.py: the regression
        packs.py         texts → packs, through the encoder: hidden states of all layers, or log-probabilities
      scores.py        standard errors, the bits of right items, the lines that are printed

Scores are kept item by item: models with one tokenizer are scored on the same items, so that they can be compared in pairs.
"""
