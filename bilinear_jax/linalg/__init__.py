"""Solvers on arrays. Nothing here knows of models, SAEs or features.

    eigenvalues   all eigenvalues of many symmetric matrices, without eigenvectors
    eigenpairs    the extreme eigenpairs of many interaction matrices, each with a bound on its error
    lanczos       the search for these pairs without forming a matrix; cycle and ritz are parts of it
    basis         a basis of many vectors reduced to a square one
    metric        inputs of a given second moment, as coordinates in which they are white
    scale         norms and ratios of numbers of any scale and type
    devices       work sharded over the devices of a mesh

This folder imports nothing else of the package. What explains a tensor or a model is in ``explain``.
"""
