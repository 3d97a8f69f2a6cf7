"""Pre- and post-processing as data, carried out with NumPy and Pillow.

Loads no torch and knows nothing of HTTP or of packages' files. A `described` model is anything with
`inputs`, `outputs` and `processing`: a package's manifest.

    arrays = preprocess(manifest, {"image": np.array([png], dtype=object)})
    answer = postprocess(manifest, runtime.run(arrays))
"""

from cluster.processing.pipeline import (
    check_processing,
    is_batchable,
    postprocess,
    preprocess,
    public_inputs,
    public_outputs,
)
from cluster.processing.specification import (
    Cast,
    ImageInput,
    Labels,
    PostStep,
    PreStep,
    Processing,
    RawInput,
    Rename,
    Reshape,
    Scale,
    Softmax,
    Standardize,
)
from cluster.processing.tensors import Array, Datatype, TensorSpec, datatype_of, numpy_dtype_of

__all__ = [
    "Array",
    "Cast",
    "Datatype",
    "ImageInput",
    "Labels",
    "PostStep",
    "PreStep",
    "Processing",
    "RawInput",
    "Rename",
    "Reshape",
    "Scale",
    "Softmax",
    "Standardize",
    "TensorSpec",
    "check_processing",
    "datatype_of",
    "is_batchable",
    "numpy_dtype_of",
    "postprocess",
    "preprocess",
    "public_inputs",
    "public_outputs",
]
