// Bundle Neuroglancer's page: `node build.mjs FOLDER`.
import { build } from "esbuild";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";

const folder = process.argv[2];
const require = createRequire(import.meta.url);
const lib = path.join(path.dirname(require.resolve("neuroglancer")));
const raw = {
  name: "raw",
  setup(pluginBuild) {
    pluginBuild.onResolve({ filter: /\?raw$/ }, async (args) => {
      const resolved = await pluginBuild.resolve(args.path.replace(/\?raw$/, ""), {
        kind: args.kind,
        resolveDir: args.resolveDir,
        importer: args.importer,
        pluginData: "raw",
      });
      // The registry's release of ikonate lacks a few icons.
      return { path: resolved.path || args.path, namespace: "raw" };
    });
    pluginBuild.onLoad({ filter: /.*/, namespace: "raw" }, async (args) => ({
      contents: await readFile(args.path, "utf8").catch(() => "<svg/>"),
      loader: "text",
    }));
  },
};
// All bundles are in one folder.
const flat = {
  name: "flat",
  setup(pluginBuild) {
    pluginBuild.onLoad({ filter: /neuroglancer\/lib\/async_computation\/request\.js$/ }, async (args) => ({
      contents: (await readFile(args.path, "utf8")).replace("../async_computation", "./async_computation"),
      loader: "js",
    }));
  },
};
await mkdir(folder, { recursive: true });
const names = ["main", "chunk_worker", "async_computation"];
await build({
  entryPoints: Object.fromEntries(names.map((n) => [`${n}.bundle`, path.join(lib, `${n}.bundle.js`)])),
  bundle: true,
  format: "esm",
  outdir: folder,
  conditions: [
    "neuroglancer/datasource:none_by_default",
    "neuroglancer/datasource/zarr:enabled",
    "neuroglancer/datasource/n5:enabled",
    "neuroglancer/datasource/precomputed:enabled",
    "neuroglancer/datasource/nifti:enabled",
  ],
  loader: { ".wasm": "file", ".html": "file", ".svg": "text" },
  minify: true,
  plugins: [raw, flat],
  target: "es2022",
});
await writeFile(
  path.join(folder, "index.html"),
  '<!doctype html><meta charset="utf-8"><title>neuroglancer</title>' +
    '<link rel="stylesheet" href="main.bundle.css">' +
    '<script type="module" src="main.bundle.js"></script>',
);
