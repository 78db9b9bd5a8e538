// Prints what the Khronos glTF validator says of the files named on the command line, as a JSON list.
const fs = require("fs");
const validator = require("gltf-validator");

Promise.all(process.argv.slice(2).map((path) => validator.validateBytes(new Uint8Array(fs.readFileSync(path)))))
  .then((reports) => console.log(JSON.stringify(reports)))
  .catch((error) => { console.error(error); process.exit(1); });
