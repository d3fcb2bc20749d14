//! What of a configuration differs in a container: folders, address, replicas.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::{VolumeFacts, names::name_of};
use crate::config::{Loaded, Volume};

/// Where an image has the plugins that belong to it.
pub(in crate::deploy) const IN_IMAGE: &str = "/opt/modalkit/plugins";
/// The volume that that is.
const IN_IMAGE_NAME: &str = "image";
/// Mirrors of buckets lie in a folder of their own: they are large, and can be fetched again.
pub(in crate::deploy) const BUCKETS_FOLDER: &str = "/var/lib/modalkit-buckets";
/// Where a certificate and its key are mounted, as a cluster's secrets of that kind name them.
pub(in crate::deploy) const TLS_FOLDER: &str = "/etc/modalkit-tls";
/// What is placed by variables of the environment.
const PLACED: [&str; 4] = ["state_folder", "buckets_folder", "management_socket", "secrets_folder"];

/// It listens to all, finds its folders where the container has them, and keeps as many replicas as there are at least: the cluster adds pods.
pub(super) fn place(written: &mut Json, loaded: &Loaded, port: u16) {
    let folder = in_container(&loaded.config.defaults.all_model_data_folder);
    written["server"]["listen"] = format!("0.0.0.0:{port}").into();
    if let Some(server) = written["server"].as_object_mut() {
        PLACED.iter().for_each(|key| drop(server.remove(*key)));
        if server.contains_key("tls") {
            let file = |name: &str| format!("{TLS_FOLDER}/{name}");
            server.insert(
                "tls".to_owned(),
                json!({"certificate": file("tls.crt"), "private_key": file("tls.key")}),
            );
        }
    }
    // Said, since the first of the volumes may be another one by now.
    written["model_settings"]["local_model_repository_folder"] = folder.display().to_string().into();
    let volumes = volumes(&loaded.config.volumes);
    match written["app_settings"]["deployment_config"].as_object_mut() {
        Some(deployment) => {
            deployment.remove("concurrency_limit");
            deployment.insert("volumes".to_owned(), volumes);
        }
        None => written["app_settings"]["deployment_config"] = json!({"volumes": volumes}),
    }
}

fn volumes(volumes: &[Volume]) -> Json {
    let mut all: serde_json::Map<String, Json> = watched(volumes)
        .map(|volume| (in_container(&volume.mount_point).display().to_string(), volume.name.clone().into()))
        .collect();
    all.insert(IN_IMAGE.to_owned(), IN_IMAGE_NAME.into());
    all.into()
}

/// Those that somebody has to provide; of a configuration that says nothing of volumes, none.
pub(super) fn claims(loaded: &Loaded, written: &Json) -> Vec<VolumeFacts> {
    let says = !written["app_settings"]["deployment_config"]["volumes"].is_null()
        || !written["model_settings"]["local_model_repository_folder"].is_null();
    let claim = |volume: &Volume| VolumeFacts {
        name: name_of(&volume.name),
        mount_point: in_container(&volume.mount_point),
    };
    if says { watched(&loaded.config.volumes).map(claim).collect() } else { Vec::new() }
}

fn watched(volumes: &[Volume]) -> impl Iterator<Item = &Volume> {
    volumes.iter().filter(|volume| volume.bucket.is_none() && volume.pipeline.is_none())
}

/// Where a volume's folder is in a container: one that is written without its beginning has none there.
fn in_container(folder: &Path) -> PathBuf {
    match folder.is_absolute() {
        true => folder.to_owned(),
        false => Path::new("/mnt").join(folder.file_name().unwrap_or_default()),
    }
}
