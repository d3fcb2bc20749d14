//! Whether one run of a graph serves several requests, and along which axes: found by what its file says, and by running it.
//!
//! Files don't say which dimension is the batch's, and may say nothing of outputs. So requests of random numbers are run, one alone and in pairs: if
//! one's answer is the same whichever other is beside it, requests share runs. That finds sequences as well, whose rows depend on those before.
//! (Alone and in a pair an engine may take other ways to multiply, whose small differences some models make large.)

use modalkit_sdk::Datatype;

use crate::{
    array::{Array, Elements},
    engine::RunFault,
    port::{Arrays, Dim, Port},
};

/// Sizes that are tried for dimensions that may have any: some models want multiples, or at least so many.
const SIZES: [usize; 6] = [32, 64, 48, 512, 1, 256];
/// Answers of two runs of the same size are the same where they differ by no more than this, or by this part of them.
const TOLERANCE: f32 = 1e-4;

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
        for (port, array) in outputs.iter_mut().zip(&seen.alone) {
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
        Ok(Seen { alone, pairs: Ok(pairs) }) => match compare(&alone, &pairs, asked.batched == Some(true)) {
            Ok(axes) => (axes, "a request's answer is the same whichever other is beside it".to_owned()),
            Err(differ) => return each(&differ),
        },
        Ok(Seen { pairs: Err(fault), .. }) => {
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
    /// The outputs of one request.
    alone: Vec<Array>,
    /// Those of three pairs: of it and another, of it and a third, and of the third and that other.
    pairs: Result<[Vec<Array>; 3], String>,
}

fn see(
    inputs: &[Port],
    axes: Option<&[Option<usize>]>,
    defaults: &Arrays,
    run: Run<'_>,
) -> Result<Seen, String> {
    let any_size = |port: &Port| port.dims.iter().any(|dim| matches!(dim, Dim::Symbolic(_)));
    let sizes = if inputs.iter().any(any_size) { &SIZES[..] } else { &SIZES[..1] };
    let mut said = String::new();
    for size in sizes {
        let request = |seed| numbers(inputs, axes, defaults, *size, seed);
        let one = request(1);
        let alone = match run(one.clone()) {
            Ok(alone) => alone,
            Err(fault) => {
                said = words(fault);
                continue;
            }
        };
        let Some(axes) = axes else { return Ok(Seen { alone, pairs: Err("it has no batch".to_owned()) }) };
        let (two, three) = (request(2), request(3));
        let pair =
            |first: &[Array], second: &[Array]| run(paired(inputs, axes, first, second)?).map_err(words);
        let pairs = || Ok([pair(&one, &two)?, pair(&one, &three)?, pair(&three, &two)?]);
        return Ok(Seen { alone, pairs: pairs() });
    }
    Err(said)
}

/// Two requests as one.
fn paired(
    inputs: &[Port],
    axes: &[Option<usize>],
    first: &[Array],
    second: &[Array],
) -> Result<Vec<Array>, String> {
    let input = |(place, port): (usize, &Port)| match axes[place] {
        Some(axis) => {
            let item = |array: &Array| array.item(axis, 0).ok_or("an input has no batch");
            let items = [item(&first[place])?, item(&second[place])?];
            Array::stack(&[&items[0], &items[1]], axis, port.datatype).map_err(|error| error.to_string())
        }
        None => Ok(first[place].clone()),
    };
    inputs.iter().enumerate().map(input).collect()
}

fn words(fault: RunFault) -> String {
    match fault {
        RunFault::Input(said) => said,
        RunFault::Engine(error) => error.to_string(),
    }
}

/// The axis of each output along which a pair has two where one request has one, and what stands there is of one request alone.
fn compare(alone: &[Array], pairs: &[Vec<Array>; 3], trusted: bool) -> Result<Vec<usize>, String> {
    let axis = |(place, alone): (usize, &Array)| {
        let [with_second, with_third, third_with_second] = pairs.each_ref().map(|outputs| &outputs[place]);
        let (one, two) = (&alone.shape, &with_second.shape);
        let grown: Vec<usize> = (0..two.len()).filter(|axis| one.get(*axis) != two.get(*axis)).collect();
        let axis = match grown[..] {
            [axis] if one.len() == two.len() && one[axis] == 1 && two[axis] == 2 => axis,
            _ => return Err(format!("of two requests an output has the shape {two:?}, of one {one:?}")),
        };
        let same = |place: usize, one: &Array, other: &Array| matches!((one.item(axis, place), other.item(axis, place)), (Some(one), Some(other)) if are_same(&one, &other));
        let independent = same(0, with_second, with_third) && same(1, with_second, third_with_second);
        if !(trusted || independent) {
            return Err(
                "a request's answer is another with another beside it: rows depend on each other. `batched = true` runs them together all the same"
                    .to_owned(),
            );
        }
        Ok(axis)
    };
    alone.iter().enumerate().map(axis).collect()
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
