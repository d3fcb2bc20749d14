//! Which models use which volume: as their entry says, else as their paths do. Pure but for the working folder's name.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::{ModelSpec, Volume};

/// Whether a model hears of changes in a volume: named in its entry, or holding its data folder, or lying in it, or named by
/// a path among its settings.
pub(super) fn uses(spec: &ModelSpec, volume: &Volume) -> bool {
    if let Some(pipeline) = &volume.pipeline {
        return *pipeline == spec.plugin;
    }
    if let Some(names) = &spec.volumes {
        return names.contains(&volume.name);
    }
    let mount = absolute(&volume.mount_point);
    let folder = absolute(&spec.all_model_data_folder);
    let in_settings = |json: &str| {
        let value: Value = serde_json::from_str(json).unwrap_or_default();
        mentions(&value, &mount)
    };
    folder.starts_with(&mount)
        || mount.starts_with(&folder)
        || in_settings(&spec.settings.json())
        || in_settings(&spec.common_settings)
}

fn mentions(value: &Value, mount: &Path) -> bool {
    match value {
        Value::String(text) => Path::new(text).is_absolute() && Path::new(text).starts_with(mount),
        Value::Array(values) => values.iter().any(|value| mentions(value, mount)),
        Value::Object(values) => values.values().any(|value| mentions(value, mount)),
        _ => false,
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Watching};

    fn volume(name: &str, mount: &str) -> Volume {
        Volume {
            name: name.into(),
            mount_point: mount.into(),
            watch: Watching::Fitting,
            pipeline: None,
            bucket: None,
        }
    }

    #[test]
    fn a_volume_is_used_by_folder_by_setting_or_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            &file,
            "[app_settings.deployment_config.volumes]\n\"/mnt/models\" = \"models\"\n\"/mnt/index\" = \"index\"\n\"/mnt/other\" = \"other\"\n\
             [model_settings]\nlocal_model_repository_folder = \"/mnt/models/today\"\n\
             [model_settings.model_entries.search]\npaths = { index = \"/mnt/index/a.npy\" }\n\
             [model_settings.model_entries.named]\nvolumes = [\"other\"]\n",
        )
        .unwrap();
        let config = config::load(&[file.path().to_owned()], &config::Environment::default()).unwrap().config;
        let volumes = [("models", "/mnt/models"), ("index", "/mnt/index"), ("other", "/mnt/other")];
        let used = |model: &str| {
            let used =
                volumes.iter().filter(|(name, mount)| uses(&config.models[model], &volume(name, mount)));
            used.map(|(name, _)| *name).collect::<Vec<_>>()
        };
        assert_eq!(used("search"), ["models", "index"]);
        assert_eq!(used("named"), ["other"]);
    }
}
