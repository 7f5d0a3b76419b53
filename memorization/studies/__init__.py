"""Studies: ``python -m memorization.studies.<name>``, each a table and a picture."""

from memorization.flags import quiet_libraries

quiet_libraries()  # a study imports the libraries before its command begins

STUDIES = {
    "amg": "the tables of AMG on a text-conditional model",
    "amg_pixel": "AMG on a pixel-space model",
    "benchmark_audit": "can a list of prompts tell detectors apart?",
    "fusion": "which two features of one trace separate best together",
    "gaussian_mixture": "the p-Laplace operator on a mixture of Gaussians",
    "localise": "where in the picture, against known masks",
    "guard": "the guard of a pipeline: copies that are still handed out, harm, cost",
    "mitigation_tradeoff": "every mitigation at five strengths",
    "p_laplace_sweep": "p-Laplace detection against p, noise level and number of points",
    "sequential": "noises where they are needed",
    "timestep_sweep": "which feature separates at which noise level",
}
