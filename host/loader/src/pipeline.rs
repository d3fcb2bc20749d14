//! A library as the plugin of a pipeline: its description, its settings, its loads. It never knows what becomes of an instance.

use modalkit_engine::{Decoded, Description, Failure, Instance, Load, Payload, Plugin, Rejection};

use crate::{
    convert, document,
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
        let document = document::load(with)?;
        let _note = with.crash_note.map(Note::new);
        let loaded = {
            let _code = Entered::new(with.model_name, "load");
            self.module().load()(document.as_str().into())
        };
        let handle = convert::result(loaded)?;
        let instance = LibraryInstance::new(self.clone(), with.model_name.into(), handle);
        instance.warmup()?;
        instance.ask_for_signature()?;
        Ok(Box::new(instance))
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        handles::decode(self, None, payload)
    }
}
