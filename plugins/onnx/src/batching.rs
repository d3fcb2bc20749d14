//! Whether one run of a graph serves several requests, and along which axes: found by what its file says, and by running it.
//!
//! Files don't say which dimension is the batch's, and may say nothing of outputs. So two requests of random numbers are run, each alone and both
//! together: if each has the same answers both times, requests share runs. That finds sequences as well, whose rows depend on those before.

use modalkit_sdk::Datatype;

use crate::{
    array::{Array, Elements},
    engine::RunFault,
    port::{Arrays, Dim, Port},
};

/// Sizes that are tried for dimensions that may have any: some models want multiples, or at least so many.
const SIZES: [usize; 6] = [32, 64, 48, 512, 1, 256];
/// Answers of two runs are the same where they differ by no more than this, or by this part of them.
const TOLERANCE: f32 = 1e-3;

/// The batch's axis of each input and output. An input without one is the same for all requests of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Axes {
    pub(crate) inputs: Vec<Option<usize>>,
    pub(crate) outputs: Vec<Option<usize>>,
}

pub(crate) struct Found {
    /// `None` where each request is a run.
    pub(crate) axes: Option<Axes>,
    /// Why, for people.
    pub(crate) because: String,
}

/// What the configuration says of a model's requests.
pub(crate) struct Asked<'a> {
    /// Whether they share runs.
    pub(crate) batched: Option<bool>,
    /// What stands for inputs that they leave out: of these, the numbers aren't random.
    pub(crate) defaults: &'a Arrays,
}

type Run<'r> = &'r dyn Fn(Vec<Array>) -> Result<Vec<Array>, RunFault>;

/// Finds the axes. What was seen of outputs' shapes is written into `outputs`.
pub(crate) fn find(inputs: &[Port], outputs: &mut [Port], asked: &Asked<'_>, run: Run<'_>) -> Found {
    let each = |because: &str| Found { axes: None, because: because.to_owned() };
    let input_axes = input_axes(inputs);
    let seen = see(inputs, input_axes.as_deref(), asked.defaults, run);
    if let Ok(seen) = &seen {
        for (port, array) in outputs.iter_mut().zip(&seen.alone[0]) {
            reshape(port, &array.shape);
        }
    }
    if asked.batched == Some(false) {
        return each("`batched` says so");
    }
    let Some(input_axes) = input_axes else {
        return each("no input begins with a dimension of any size");
    };
    let named = || {
        let symbol = inputs.iter().zip(&input_axes).find_map(|(port, axis)| match &port.dims[(*axis)?] {
            Dim::Symbolic(symbol) => Some(symbol.as_str()),
            Dim::Fixed(_) => None,
        });
        outputs.iter().map(|port| port.axis_of(symbol?)).collect::<Option<Vec<usize>>>()
    };
    let (output_axes, because) = match seen {
        Ok(Seen { alone, together: Ok(together) }) => {
            match compare(&alone, &together, asked.batched == Some(true)) {
                Ok(axes) => {
                    (axes, "two requests run together had the answers that each had alone".to_owned())
                }
                Err(differ) => return each(&differ),
            }
        }
        Ok(Seen { together: Err(fault), .. }) => {
            return each(&format!("two requests can't run together: {fault}"));
        }
        // Nothing could be run with numbers that mean nothing: what the file says must do.
        Err(fault) => match named() {
            Some(axes) => (axes, "its outputs name the dimension that its inputs begin with".to_owned()),
            None if asked.batched == Some(true) => (vec![0; outputs.len()], "`batched` says so".to_owned()),
            None => return each(&format!("it can't be run with numbers that mean nothing: {fault}")),
        },
    };
    let outputs = output_axes.into_iter().map(Some).collect();
    Found { axes: Some(Axes { inputs: input_axes, outputs }), because }
}

/// The first input that begins with a dimension of any size names the batch. Others have it where that name stands, or where a dimension has no
/// name at all.
fn input_axes(inputs: &[Port]) -> Option<Vec<Option<usize>>> {
    let batch = inputs.iter().find_map(|port| match port.dims.first() {
        Some(Dim::Symbolic(symbol)) => Some(symbol.as_str()),
        _ => None,
    })?;
    let axis = |port: &Port| {
        let is_nameless = |axis: &usize| match &port.dims[*axis] {
            Dim::Symbolic(symbol) => *symbol == format!("{}.{axis}", port.name),
            Dim::Fixed(_) => false,
        };
        port.axis_of(batch).or_else(|| (0..port.dims.len()).find(is_nameless))
    };
    Some(inputs.iter().map(axis).collect())
}

struct Seen {
    /// The outputs of two requests.
    alone: [Vec<Array>; 2],
    /// Those of a run of both.
    together: Result<Vec<Array>, String>,
}

fn see(
    inputs: &[Port],
    axes: Option<&[Option<usize>]>,
    defaults: &Arrays,
    run: Run<'_>,
) -> Result<Seen, String> {
    let mut said = "no size was tried".to_owned();
    for size in SIZES {
        let request = |seed| numbers(inputs, axes, defaults, size, seed);
        let (one, two) = (request(1), request(2));
        let first = match run(one.clone()) {
            Ok(first) => first,
            Err(fault) => {
                said = words(fault);
                let any_size = |port: &Port| port.dims.iter().any(|dim| matches!(dim, Dim::Symbolic(_)));
                if inputs.iter().any(any_size) {
                    continue;
                }
                return Err(said);
            }
        };
        let Some(axes) = axes else { return Ok(Seen { alone: [first.clone(), first], together: Err(said) }) };
        let second = run(two.clone()).map_err(words)?;
        let both: Option<Vec<Array>> = (one.iter().zip(&two).zip(inputs.iter().zip(axes)))
            .map(|((one, two), (port, axis))| match axis {
                Some(axis) => {
                    let items = [one.item(*axis, 0)?, two.item(*axis, 0)?];
                    Array::stack(&[&items[0], &items[1]], *axis, port.datatype).ok()
                }
                None => Some(one.clone()),
            })
            .collect();
        let together = match both {
            Some(both) => run(both).map_err(words),
            None => Err("its inputs can't be put together".to_owned()),
        };
        return Ok(Seen { alone: [first, second], together });
    }
    Err(said)
}

fn words(fault: RunFault) -> String {
    match fault {
        RunFault::Input(said) => said,
        RunFault::Engine(error) => error.to_string(),
    }
}

/// The axis of each output along which there are two where there was one, and what stands there is what each request had.
fn compare(alone: &[Vec<Array>; 2], together: &[Array], trusted: bool) -> Result<Vec<usize>, String> {
    let mut axes = Vec::new();
    for (place, both) in together.iter().enumerate() {
        let [one, two] = [&alone[0][place], &alone[1][place]];
        let grown: Vec<usize> =
            (0..both.shape.len()).filter(|axis| one.shape.get(*axis) != both.shape.get(*axis)).collect();
        let [axis] = grown[..] else {
            return Err(format!(
                "of two requests an output has the shape {:?}, of one {:?}",
                both.shape, one.shape
            ));
        };
        let doubled = one.shape.len() == both.shape.len() && one.shape[axis] == 1 && both.shape[axis] == 2;
        if !doubled {
            return Err(format!(
                "of two requests an output has the shape {:?}, of one {:?}",
                both.shape, one.shape
            ));
        }
        let same = |place: usize, alone: &Array| matches!((both.item(axis, place), alone.item(axis, 0)), (Some(one), Some(other)) if are_same(&one, &other));
        if !trusted && !(same(0, one) && same(1, two)) {
            return Err(
                "two requests run together had other answers than each alone: its rows depend on each other. `batched = true` runs them together all the same"
                    .to_owned(),
            );
        }
        axes.push(axis);
    }
    Ok(axes)
}

fn are_same(one: &Array, other: &Array) -> bool {
    match (one.elements.to_f32(), other.elements.to_f32()) {
        (Some(one), Some(other)) => one.iter().zip(&other).all(|(one, other)| {
            (one - other).abs() <= TOLERANCE * (1.0 + other.abs())
                || one.to_bits() == other.to_bits()
                || (one.is_nan() && other.is_nan())
        }),
        _ => one == other,
    }
}

/// Random numbers for each input, others for each seed. Whole numbers are 0 and 1, which tables of any size have, and begin with 1: masks that hide
/// everything are no numbers to divide by.
fn numbers(
    inputs: &[Port],
    axes: Option<&[Option<usize>]>,
    defaults: &Arrays,
    size: usize,
    seed: u64,
) -> Vec<Array> {
    let array = |(place, port): (usize, &Port)| {
        let axis = axes.and_then(|axes| axes[place]);
        // One that doesn't fit is refused later.
        let default =
            defaults.get(&port.name).filter(|array| array.shape.len() == port.without(axis).dims.len());
        if let Some(array) = default {
            let stacked = axis.map_or_else(
                || array.cast(port.datatype),
                |axis| Array::stack(&[array], axis, port.datatype),
            );
            return stacked.unwrap_or_else(|_| array.clone());
        }
        let sizes = port.dims.iter().enumerate().map(|(at, dim)| match dim {
            _ if axis == Some(at) => 1,
            Dim::Fixed(size) => *size,
            Dim::Symbolic(_) => size,
        });
        let shape: Vec<usize> = sizes.collect();
        let count: usize = shape.iter().product();
        // What is the same for all requests is the same for both seeds.
        let seed = if axis.is_some() || axes.is_none() { seed } else { 0 };
        let mut random = fastrand::Rng::with_seed(seed << 32 | place as u64);
        let source = match port.datatype {
            Datatype::Fp32 | Datatype::Fp64 | Datatype::Fp16 => {
                Elements::F64((0..count).map(|_| random.f64()).collect())
            }
            Datatype::Bytes => Elements::Strings(vec!["a".to_owned(); count]),
            _ => Elements::I64((0..count).map(|index| i64::from(index == 0 || random.f64() < 0.5)).collect()),
        };
        let whole = Array { shape, elements: source };
        whole.cast(port.datatype).unwrap_or(whole)
    };
    inputs.iter().enumerate().map(array).collect()
}

/// Writes down what an output was seen to be, where its file says nothing, or something else.
fn reshape(port: &mut Port, seen: &[usize]) {
    let any = |axis: usize| Dim::Symbolic(format!("{}.{axis}", port.name));
    let fits = port.is_shaped && port.dims.len() == seen.len();
    let dim = |(axis, size): (usize, &usize)| match port.dims.get(axis).filter(|_| fits) {
        Some(Dim::Fixed(declared)) if declared != size => any(axis),
        Some(declared) => declared.clone(),
        None => any(axis),
    };
    port.dims = seen.iter().enumerate().map(dim).collect();
    port.is_shaped = true;
}
