"""Models, SAEs, tokenizers and texts on disk: where they are, and how they are read and written.

    sources       built-in names, folders and the hub; which SAEs there are
    checkpoint    save and load models and SAEs       convert     published files to checkpoints, and back
    published     what others wrote, as arrays        gguf_tokenizer   the tokenizer in a GGUF file
    tokenizers    find, train, save and hash          documents   text files and hub datasets, one document at a time
    tokens        text as one file of token ids       datasets    rows of token ids
    params        the arrays of a checkpoint
    files         folders that appear when complete; JSON
    checksums     of files, arrays, texts and JSON records
    fields        the fields of configs as options    version     of the library
    terminal      what is printed, made safe

This package may import ``nn`` and ``weights_convert``. Nothing here runs a model.
"""
