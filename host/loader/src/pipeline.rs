//! A library as the plugin of a pipeline: its description, its settings, its loads. It never knows what becomes of an instance.

use modalkit_abi::{LeasedDevice, LoadArgs};
use modalkit_engine::{Decoded, Description, Device, Failure, Instance, Load, Payload, Plugin, Rejection};

use crate::{
    convert,
    ending::{Entered, Note},
    handles::{self, LibraryInstance},
    library::PipelineLibrary,
};

impl Plugin for PipelineLibrary {
    fn description(&self) -> &Description {
        self.about()
    }

    fn check_settings(&self, settings: &str) -> Result<(), Failure> {
        let _code = Entered::new(self.name(), "check of settings");
        convert::result(self.module().check_settings()(settings.into()))
    }

    fn load(&self, with: &Load<'_>) -> Result<Box<dyn Instance>, Failure> {
        let secrets = convert::secrets(with.secrets);
        let devices: Vec<LeasedDevice<'_>> = with.devices.iter().map(leased).collect();
        let args = LoadArgs {
            model_name: with.model_name.into(),
            all_model_data_folder: with.all_model_data_folder.into(),
            common_settings: with.common_settings.into(),
            settings: with.settings.into(),
            secrets: secrets.as_slice().into(),
            devices: devices.as_slice().into(),
        };
        let _note = with.crash_note.map(Note::new);
        let loaded = {
            let _code = Entered::new(with.model_name, "load");
            self.module().load()(args)
        };
        let handle = convert::result(loaded)?;
        let instance = LibraryInstance::new(self.clone(), with.model_name.into(), handle);
        instance.warmup()?;
        Ok(Box::new(instance))
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        handles::decode(self, None, payload)
    }
}

fn leased<'a>(device: &Device<'a>) -> LeasedDevice<'a> {
    LeasedDevice {
        ordinal: device.ordinal,
        name: device.name.into(),
        uuid: device.uuid.into(),
        memory_bytes: device.memory_bytes,
        memory_budget_bytes: device.memory_budget_bytes.into(),
    }
}
