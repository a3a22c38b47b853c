"""Feature pages: a static site that shows what each feature does, and how the weights explain it.

    gather        collects the facts of a site: reads the weights (``explain``), measures on data (``measure``), and
                  puts the results together
    facts         what a page states, as plain data   options       how much a page shows
    activity      when a feature fires                making        which eigenpairs make it fire, and how much that is
    pairs         which input features make it fire
    render        facts to HTML                       site          HTML to a folder
    provenance    where the numbers come from         neuronpedia   the same facts as Neuronpedia's files

It may import ``explain``, ``measure``, ``show`` and what these import.
"""
