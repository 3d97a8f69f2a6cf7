"""Model packages: the only thing that passes from `jobs` to `serve_apps`.

The public face. `FORMAT.md` is the written specification. Importing this loads no torch,
transformers, onnxruntime or model_signing; the functions load what they need.

    writing   write_package(model_dir, name=…, kind=…, storage=…, signer=…) -> PublishedPackage
    reading   open_package(digest, storage=…, trust=…, cache_dir=…)         -> ModelPackage
              open_version(version, settings)                               -> ModelPackage
              open_digest(digest, settings)                                 -> ModelPackage
              open_copy(digest, settings)                                   -> ModelPackage | None
              open_base(adapter, settings)                                  -> ModelPackage
              verify_directory(path, trust)                                 -> ModelPackage
    golden    golden.replay(package), golden.check_graph(manifest, run),
              golden.check_language_model(manifest, completions)
    deriving  parity.certify(before, after, relative_tolerance), parity.graph_outputs(…),
              parity.token_logits(…)
    signing   open_signer(settings) -> Signer, open_trust(settings) -> Trust
    at rest   open_keyset(settings) -> Keyset, encrypting_keyset(settings) -> Keyset | None
    keys      ensure_local_key(keys_dir), SigningKeys(keys_dir)
"""

from cluster.model_package import golden, parity, signing
from cluster.model_package.encryption import Keyset
from cluster.model_package.keys import SigningKey, SigningKeys, ensure_local_key
from cluster.model_package.manifest import (
    FORMAT_VERSION,
    AdapterInfo,
    FileEntry,
    Golden,
    Kind,
    LanguageModelInfo,
    Lineage,
    Manifest,
    package_key,
)
from cluster.model_package.opening import (
    encrypting_keyset,
    open_base,
    open_copy,
    open_digest,
    open_keyset,
    open_signer,
    open_trust,
    open_version,
)
from cluster.model_package.reader import (
    ModelPackage,
    fetched,
    open_package,
    verify_directory,
)
from cluster.model_package.signing import (
    LocalSigner,
    Signer,
    Trust,
    TrustStore,
)
from cluster.model_package.writer import PublishedPackage, write_package

__all__ = [
    "FORMAT_VERSION",
    "AdapterInfo",
    "FileEntry",
    "Golden",
    "Keyset",
    "Kind",
    "LanguageModelInfo",
    "Lineage",
    "LocalSigner",
    "Manifest",
    "ModelPackage",
    "PublishedPackage",
    "Signer",
    "SigningKey",
    "SigningKeys",
    "Trust",
    "TrustStore",
    "encrypting_keyset",
    "ensure_local_key",
    "fetched",
    "golden",
    "open_base",
    "open_copy",
    "open_digest",
    "open_keyset",
    "open_package",
    "open_signer",
    "open_trust",
    "open_version",
    "package_key",
    "parity",
    "signing",
    "verify_directory",
    "write_package",
]
