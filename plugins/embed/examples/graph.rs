//! Writes the graph of a folder's weights as an ONNX file, for others that run such: `graph FOLDER FILE`.

#[path = "../src/bert.rs"]
#[allow(dead_code, reason = "the pipeline asks for more of it")]
mod bert;

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder, file] = &arguments[..] else { return Err("expected FOLDER FILE".into()) };
    let folder = Path::new(folder);
    let shape = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
    let graph = bert::write(&shape, &fs::read(folder.join("model.safetensors"))?)
        .map_err(|error| error.to_string())?;
    Ok(fs::write(file, graph)?)
}
