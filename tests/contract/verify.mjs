// A second verifier of model packages, written from docs/model-packages.md and FORMAT.md alone.
//
//   node verify.mjs TRUSTED_DIR PACKAGE_DIR[=DIGEST] …
//
// One JSON line per package: {"digest", "signer"} or {"refused": REASON}.
// Exit code 1 if any was refused.

import { createHash, createPublicKey, verify as verifySignature } from "node:crypto";
import { closeSync, existsSync, lstatSync, openSync, readFileSync, readSync, readdirSync } from "node:fs";
import { join } from "node:path";

const SUFFIXES = [".json", ".safetensors", ".onnx", ".data", ".txt", ".model", ".jinja", ".md"];
const NEEDED = {
  graph: ["model.onnx"],
  language_model: ["config.json"],
  adapter: ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
};
const KEYS = new Set([
  "format_version", "kind", "name", "created_at", "files", "inputs", "outputs", "processing",
  "language_model", "adapter", "quantisation", "profile", "metrics", "parity", "golden", "lineage",
]);
const CODE_KEYS = new Set(["auto_map", "custom_pipelines", "custom_generate"]);
const ADAPTER_CODE_KEYS = new Set(["auto_mapping", "megatron_config"]);
const KERNEL_KEYS = new Set([
  "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
]);
const MIB = 1024 * 1024;

class Refusal extends Error {}

function refuse(reason) {
  throw new Refusal(reason);
}

// Section 1: names and kinds alone; nothing is opened.
function listFiles(directory, prefix = "", found = new Map()) {
  for (const name of readdirSync(directory)) {
    const path = prefix + name;
    const info = lstatSync(join(directory, name));
    if (!/^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}$/.test(name) || path.split("/").length > 8) {
      refuse("forbidden file");
    }
    if (info.isDirectory()) {
      listFiles(join(directory, name), `${path}/`, found);
      continue;
    }
    const allowed = SUFFIXES.some((suffix) => name.toLowerCase().endsWith(suffix));
    if (!info.isFile() || !(allowed || name === "LICENSE" || name === "NOTICE")) {
      refuse("forbidden file");
    }
    found.set(path, info.size);
    if (found.size > 10000) refuse("forbidden file");
  }
  return found;
}

// Section 2: JSON in which no key appears twice and every number and text can be written again.
function parse(bytes, reason) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    const value = JSON.parse(text);
    const open = [];
    const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g);
    tokens.forEach((token, index) => {
      if (token === "{") open.push(new Set());
      else if (token === "[") open.push(null);
      else if (token === "}" || token === "]") open.pop();
      else if (token.startsWith('"')) {
        const string = JSON.parse(token);
        if (!string.isWellFormed()) refuse(reason);
        if (tokens[index + 1] !== ":") return;
        if (open.at(-1).has(string)) refuse(reason);
        open.at(-1).add(string);
      } else if (/^[-\d]/.test(token) && !Number.isFinite(Number(token))) refuse(reason);
    });
    return value;
  } catch {
    return refuse(reason);
  }
}

function sha256(path) {
  const hash = createHash("sha256");
  const piece = Buffer.alloc(MIB);
  const file = openSync(path, "r");
  try {
    for (let size; (size = readSync(file, piece)) > 0; ) hash.update(piece.subarray(0, size));
  } finally {
    closeSync(file);
  }
  return hash.digest("hex");
}

// Section 3: the signer's name and what they signed, path -> digest.
function openSignature(directory, trusted) {
  const bundle = parse(readFileSync(join(directory, "signature.json")), "bad signature");
  const signer = bundle?.verificationMaterial?.publicKey?.hint;
  if (typeof signer !== "string" || !/^[0-9a-f]{64}$/.test(signer)) refuse("bad signature");
  if (existsSync(join(trusted, `${signer}.revoked`))) refuse("revoked key");
  if (!existsSync(join(trusted, `${signer}.pub`))) refuse("unknown key");
  const pem = readFileSync(join(trusted, `${signer}.pub`));
  if (createHash("sha256").update(pem).digest("hex") !== signer) refuse("bad signature");
  const envelope = bundle.dsseEnvelope;
  const type = "application/vnd.in-toto+json";
  if (bundle.mediaType !== "application/vnd.dev.sigstore.bundle.v0.3+json") refuse("bad signature");
  if (envelope?.payloadType !== type || typeof envelope.payload !== "string") refuse("bad signature");
  if (typeof envelope.signatures?.[0]?.sig !== "string") refuse("bad signature");
  const payload = Buffer.from(envelope.payload, "base64");
  const signed = Buffer.concat([Buffer.from(`DSSEv1 28 ${type} ${payload.length} `), payload]);
  const signature = Buffer.from(envelope.signatures[0].sig, "base64");
  if (!verifySignature("sha256", signed, createPublicKey(pem), signature)) refuse("bad signature");
  return [signer, readStatement(parse(payload, "bad signature"))];
}

function readStatement(statement) {
  if (statement?._type !== "https://in-toto.io/Statement/v1") refuse("bad signature");
  if (statement.predicateType !== "https://model_signing/signature/v1.0") refuse("bad signature");
  const resources = statement.predicate?.resources;
  if (!Array.isArray(resources)) refuse("bad signature");
  const root = createHash("sha256");
  const listed = new Map();
  for (const item of resources) {
    const { name, algorithm, digest } = item ?? {};
    if (typeof name !== "string" || algorithm !== "sha256" || listed.has(name)) refuse("bad signature");
    if (typeof digest !== "string" || !/^[0-9a-f]{64}$/.test(digest)) refuse("bad signature");
    root.update(Buffer.from(digest, "hex"));
    listed.set(name, digest);
  }
  if (root.digest("hex") !== statement.subject?.[0]?.digest?.sha256) refuse("bad signature");
  return listed;
}

function compare(expected, actual) {
  for (const name of actual.keys()) if (!expected.has(name)) refuse("extra file");
  for (const name of expected.keys()) if (!actual.has(name)) refuse("missing file");
  for (const [name, digest] of expected) if (actual.get(name) !== digest) refuse("changed file");
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function checkManifest(manifest, actual) {
  if (!isObject(manifest)) refuse("bad manifest");
  if (manifest.format_version > 1) refuse("newer format");
  if (Object.keys(manifest).some((key) => !KEYS.has(key))) refuse("bad manifest");
  if (!(manifest.kind in NEEDED) || !isObject(manifest.files)) refuse("bad manifest");
  if (typeof manifest.name !== "string" || typeof manifest.created_at !== "string") refuse("bad manifest");
  if (!isObject(manifest.golden)) refuse("bad manifest");
  const declared = new Map();
  for (const [name, entry] of Object.entries(manifest.files)) {
    if (!name.startsWith("model/")) refuse("forbidden file");
    declared.set(name, entry?.sha256);
  }
  compare(declared, actual);
  for (const name of NEEDED[manifest.kind]) if (!declared.has(`model/${name}`)) refuse("missing file");
  if ((manifest.kind === "adapter") !== isObject(manifest.adapter)) refuse("bad manifest");
}

function namesCode(value, keys) {
  if (Array.isArray(value)) return value.some((item) => namesCode(item, keys));
  if (!isObject(value)) return false;
  return Object.entries(value).some(
    ([key, item]) =>
      (keys.has(key) && item && !(typeof item === "object" && Object.keys(item).length === 0)) ||
      (KERNEL_KEYS.has(key) && String(item).includes("/")) ||
      namesCode(item, keys),
  );
}

// Section 6, in its order.
function verify(directory, trusted, wanted) {
  const sizes = listFiles(directory);
  if (!sizes.has("manifest.json")) refuse("missing file");
  if (!sizes.has("signature.json")) refuse("not signed");
  if (sizes.get("manifest.json") > 64 * MIB) refuse("bad manifest");
  if (sizes.get("signature.json") > 16 * MIB) refuse("bad signature");
  const [signer, listed] = openSignature(directory, trusted);
  const actual = new Map();
  for (const name of sizes.keys()) {
    if (name !== "signature.json") actual.set(name, sha256(join(directory, name)));
  }
  compare(listed, actual);
  const digest = `sha256:${actual.get("manifest.json")}`;
  if (wanted && digest !== wanted) refuse("changed file");
  actual.delete("manifest.json");
  checkManifest(parse(readFileSync(join(directory, "manifest.json")), "bad manifest"), actual);
  for (const name of actual.keys()) {
    if (!name.endsWith("config.json")) continue;
    const keys = name.endsWith("adapter_config.json")
      ? new Set([...CODE_KEYS, ...ADAPTER_CODE_KEYS])
      : CODE_KEYS;
    const values = JSON.parse(readFileSync(join(directory, name), "utf-8"));
    if (namesCode(values, keys)) refuse("forbidden file");
  }
  return { digest, signer };
}

const [trusted, ...packages] = process.argv.slice(2);
for (const argument of packages) {
  const [directory, wanted] = argument.split("=");
  let outcome;
  try {
    outcome = verify(directory, trusted, wanted);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    outcome = { refused: error.message };
    process.exitCode = 1;
  }
  console.log(JSON.stringify(outcome));
}
