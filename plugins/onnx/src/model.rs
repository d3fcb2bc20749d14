//! A model that is loaded: what its file says, the engine that runs it, and how several requests run at once.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use modalkit_sdk::{Device, Invalid, Outcome, PipelineError};

use crate::{
    Settings,
    array::Array,
    batching::{self, Axes, Known},
    engine::{self, Engine, Kind, RunFault, Wanted},
    file::{ModelFile, Table},
    port::{self, Arrays, Limits, Port, describe_all},
};

pub(crate) struct Model {
    engine: Box<dyn Engine>,
    /// Of the graph.
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Of one request.
    pub(crate) item_inputs: Vec<Port>,
    pub(crate) item_outputs: Vec<Port>,
    tables: Vec<Table>,
    /// What stands for inputs that a request leaves out.
    defaults: Arrays,
    /// The most that dimensions of any size may have.
    dimensions_max: BTreeMap<String, usize>,
    axes: Option<Axes>,
}

impl Model {
    pub(crate) fn load(
        path: &Path,
        settings: &Settings,
        device: Option<&Device>,
    ) -> Result<Self, PipelineError> {
        let mut file = ModelFile::read(path, settings.outputs.as_deref())?;
        file.pin(&settings.dimensions)?;
        file.check_symbols("dimensions_max", settings.dimensions_max.keys())?;
        let ModelFile { inputs, mut outputs, tables, is_quantised } = file;
        let engine = engine::open(
            settings.engine,
            &Wanted {
                path,
                threads: settings.threads.get(),
                library: settings.library.as_ref(),
                device,
                inputs: &inputs,
                outputs: &outputs,
            },
        )?;
        if is_quantised && settings.engine == Kind::Rten {
            tracing::warn!(path = %path.display(), "weights of 8 bits: by rten answers may differ from those that the model was made for by more than rounding; `engine = \"onnxruntime\"` gives them");
        }
        let run = |arrays: Vec<Array>| guarded(&*engine, arrays);
        let known = Known {
            inputs: &inputs,
            batched: settings.batched,
            defaults: &settings.defaults,
            tables: &tables,
        };
        let found = batching::find(&known, &mut outputs, &run)?;
        if !found.has_run {
            tracing::warn!(path = %path.display(), because = found.because, "the model was not run at load: what keeps it from running shows with the first requests; `dimensions` and `defaults` may help");
        }
        let axes = found.axes;
        tracing::info!(
            path = %path.display(), engine = engine.name(), inputs = describe_all(&inputs), outputs = describe_all(&outputs),
            batched = axes.is_some(), because = found.because, "ONNX model loaded"
        );
        let without = |ports: &[Port], axes: Option<&Vec<Option<usize>>>| {
            let axis = |place: usize| axes.and_then(|axes| axes[place]);
            ports.iter().enumerate().map(|(place, port)| port.without(axis(place))).collect()
        };
        let item_inputs = without(&inputs, axes.as_ref().map(|axes| &axes.inputs));
        let item_outputs = without(&outputs, axes.as_ref().map(|axes| &axes.outputs));
        let model = Self {
            engine,
            inputs,
            outputs,
            item_inputs,
            item_outputs,
            tables,
            defaults: settings.defaults.clone(),
            dimensions_max: settings.dimensions_max.clone(),
            axes,
        };
        model.check_defaults()?;
        Ok(model)
    }

    pub(crate) fn engine(&self) -> &'static str {
        self.engine.name()
    }

    /// Whether one run serves several requests.
    pub(crate) fn is_batched(&self) -> bool {
        self.axes.is_some()
    }

    /// Whether it is known what its answers look like: not where the file doesn't say, and nothing could be run.
    pub(crate) fn is_shaped(&self) -> bool {
        self.outputs.iter().all(|port| port.is_shaped)
    }

    /// The array that a request has for an input, or the one that stands for it.
    pub(crate) fn of_request<'a>(&'a self, request: &'a Arrays, port: &Port) -> Option<&'a Array> {
        request.get(&port.name).or_else(|| self.defaults.get(&port.name))
    }

    /// The same of an input of this name, where the model has one.
    pub(crate) fn input_named<'a>(&'a self, request: &'a Arrays, name: &str) -> Option<&'a Array> {
        let port = self.item_inputs.iter().find(|port| port.name == name)?;
        self.of_request(request, port)
    }

    pub(crate) fn may_be_left_out(&self, port: &Port) -> bool {
        self.defaults.contains_key(&port.name)
    }

    /// Each by itself: sizes with one name may be others in a request.
    fn check_defaults(&self) -> Result<(), PipelineError> {
        for (name, array) in &self.defaults {
            let Some(port) = self.item_inputs.iter().find(|port| port.name == *name) else {
                return Err(PipelineError::permanent(format!(
                    "`defaults` names `{name}`; expected some of {}",
                    describe_all(&self.item_inputs)
                )));
            };
            let alone = Arrays::from([(name.clone(), array.clone())]);
            let limits = Limits {
                defaults: &Arrays::new(),
                dimensions_max: &self.dimensions_max,
                engine: &*self.engine,
            };
            port::check(std::slice::from_ref(port), &alone, &limits)
                .and_then(|()| self.check_tables(&alone))
                .map_err(|invalid| PipelineError::permanent(format!("`defaults`: {invalid}")))?;
        }
        Ok(())
    }

    pub(crate) fn check(&self, arrays: &Arrays) -> Result<(), Invalid> {
        let limits =
            Limits { defaults: &self.defaults, dimensions_max: &self.dimensions_max, engine: &*self.engine };
        port::check(&self.item_inputs, arrays, &limits)?;
        self.check_tables(arrays)
    }

    fn check_tables(&self, arrays: &Arrays) -> Result<(), Invalid> {
        for table in &self.tables {
            let rows = table.rows;
            let chosen = arrays.get(&table.input);
            let outside = chosen.and_then(|array| array.elements.first_outside(0, rows - 1));
            if let Some((place, found)) = outside {
                return Err(Invalid::new(format!(
                    "expected numbers from 0 to {}, the rows of the model's table; found {found}",
                    rows - 1
                ))
                .at(table.input.as_str())
                .at(place));
            }
        }
        Ok(())
    }

    /// Whether two requests' arrays can be in one run: of the same shapes, and equal where the model has one for all.
    pub(crate) fn go_together(&self, one: &Arrays, other: &Arrays) -> bool {
        let Some(axes) = &self.axes else { return false };
        self.inputs.iter().zip(&axes.inputs).all(|(port, axis)| {
            let (one, other) = (self.of_request(one, port), self.of_request(other, port));
            match axis {
                Some(_) => one.map(|array| &array.shape) == other.map(|array| &array.shape),
                None => one == other,
            }
        })
    }

    /// Requests' arrays as the graph's inputs.
    pub(crate) fn join(&self, requests: &[&Arrays]) -> Result<Vec<Array>, PipelineError> {
        let join = |(place, port): (usize, &Port)| {
            let missing = || PipelineError::permanent(format!("`{}` was not validated", port.name));
            let arrays: Vec<&Array> = (requests.iter())
                .map(|arrays| self.of_request(arrays, port).ok_or_else(missing))
                .collect::<Result<_, _>>()?;
            match self.axes.as_ref().and_then(|axes| axes.inputs[place]) {
                Some(axis) => Array::stack(&arrays, axis, port.datatype),
                None => arrays.first().ok_or_else(missing)?.cast(port.datatype),
            }
        };
        self.inputs.iter().enumerate().map(join).collect()
    }

    /// Runs the graph.
    pub(crate) fn run(&self, inputs: Vec<Array>) -> Result<Vec<Array>, RunFault> {
        guarded(&*self.engine, inputs)
    }

    /// One request's part of a run's outputs, of those of several.
    pub(crate) fn item(&self, outputs: &[Array], place: usize, count: usize) -> Outcome<Vec<Array>> {
        let Some(axes) = &self.axes else { return Ok(outputs.to_vec()) };
        let item = |((array, axis), port): ((&Array, &Option<usize>), &Port)| {
            let axis = axis.filter(|axis| array.shape.get(*axis) == Some(&count));
            axis.and_then(|axis| array.item(axis, place)).ok_or_else(|| {
                PipelineError::permanent(format!(
                    "the output `{}` of {count} requests has the shape {:?}: say `batched = false` in the model's entry",
                    port.name, array.shape
                ))
            })
        };
        outputs.iter().zip(&axes.outputs).zip(&self.outputs).map(item).collect()
    }
}

/// An engine's panic is its answer to that input.
fn guarded(engine: &dyn Engine, inputs: Vec<Array>) -> Result<Vec<Array>, RunFault> {
    catch_unwind(AssertUnwindSafe(|| engine.run(inputs))).unwrap_or_else(|panic| {
        let said = (panic.downcast_ref::<String>().map(String::as_str))
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no words");
        Err(RunFault::Input(format!("the engine panicked: {said}")))
    })
}
