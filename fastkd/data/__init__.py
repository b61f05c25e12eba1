"""From a corpus to batches. Imports nothing else of fastkd.

The road of text, file by file: what goes in → what comes out.

    corpus.py        names in --corpus → sources → units in their order of reading (any first part is a sample)
      hub.py           a hub dataset → its row groups or files, of one commit
        hub_parquet.py   a row group on the hub → documents, its column fetched by one request
        hub_requests.py  tries a request again, or says in one line why it failed
      local_files.py   a local file → blocks of text → documents;  parquet.py: its row groups → documents
        walk.py          a path, folder or pattern → files;  contents.py: opens one, names what is wrong with it
      rows.py          a row → its text;  order.py: the random order of units
    tokenise.py      documents → token ids, in processes
    reading.py       units → token ids, part by part, from any document on
    heldout.py       token ids → for training, for validation
    part.py          token ids → files of a part, verified when loaded
    builder.py       builds the parts that are missing, here or in a process ahead of training;  progress.py shows it
    shards.py        a corpus on disk: build_shards, Shards;  recipe.py: what it is made from, its folder's name
    sequences.py     a part's documents → sequences of at most seq_length
    packing.py       sequences, shuffled → packs of exactly P tokens;  epochs.py: a cache of shuffled epochs
    assembly.py      packs → ids, positions and cu_seqlens of a micro-batch on the host
    masking.py       ids → masked ids, predicted rows and labels, on the device
    batches.py       BatchStream.step(i) → the batches of a step

sizes.py has the sizes of packs, micro-batches and steps; unknown.py checks that the tokenizer fits the corpus.

The calls by which a hub dataset becomes a batch:

    shards.build_shards → builder.build, which writes what is missing of a corpus:
        corpus.units → hub.HubDataset.units → reading.Reading.part (documents → tokenise → token ids) → part.write_part
    batches.BatchStream.step, which reads it:
        sequences.Texts → packing.Packer.fragments → assembly.Assembler → masking.Masker → Batch
"""
