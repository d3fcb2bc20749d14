//! Whether one run of a graph serves several requests, and along which axes: found by what its file says, and by running it.
//!
//! Files don't say which dimension is the batch's, and may say nothing of outputs. So requests of random numbers are run, one alone and in pairs: if
//! one's answer is the same whichever other is beside it, before it or behind it, requests share runs. That finds sequences as well, whose rows depend on
//! those before, or on their place. (Alone and in a pair an engine may take other ways to multiply, whose small differences some models make large: only
//! pairs are compared.)

use modalkit_sdk::{Datatype, PipelineError};

use crate::{
    array::{Array, Elements},
    engine::RunFault,
    file::Table,
    port::{Arrays, Dim, Port},
};

/// Sizes that are tried for dimensions that may have any: some models want multiples, or at least so many.
const SIZES: [usize; 6] = [32, 64, 48, 512, 1, 256];
/// Elements of an input that is tried, at most.
const ELEMENTS_MAX: usize = 1 << 23;
/// Answers of runs of the same size are the same where they differ by no more than this part of the largest number in them.
const TOLERANCE: f32 = 1e-5;

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
    /// Whether it could be run at all.
    pub(crate) has_run: bool,
}

/// What is known of a model's requests before.
pub(crate) struct Known<'a> {
    pub(crate) inputs: &'a [Port],
    /// Whether they share runs, where the configuration says so.
    pub(crate) batched: Option<bool>,
    /// What stands for inputs that they leave out: of these, the numbers aren't random.
    pub(crate) defaults: &'a Arrays,
    /// Tables that inputs choose rows of.
    pub(crate) tables: &'a [Table],
}

type Run<'r> = &'r dyn Fn(Vec<Array>) -> Result<Vec<Array>, RunFault>;

/// Finds the axes. What was seen of outputs' shapes is written into `outputs`.
///
/// # Errors
/// The configuration says that requests share runs, and they can't.
pub(crate) fn find(known: &Known<'_>, outputs: &mut [Port], run: Run<'_>) -> Result<Found, PipelineError> {
    let axes = input_axes(known.inputs);
    let seen = see(known, axes.as_deref(), run)?;
    let has_run = seen.is_ok();
    if let Ok(seen) = &seen {
        for (port, array) in outputs.iter_mut().zip(&seen.alone) {
            reshape(port, &array.shape);
        }
    }
    let each = |because: String| match known.batched {
        Some(true) => Err(PipelineError::permanent(format!(
            "`batched` is true, and requests can't share runs: {because}"
        ))),
        _ => Ok(Found { axes: None, because, has_run }),
    };
    if known.batched == Some(false) {
        return each("`batched` says so".to_owned());
    }
    let Some(inputs) = axes else {
        return each("no input begins with a dimension of any size".to_owned());
    };
    let (outputs, because) = match seen {
        Ok(Seen { alone, pairs: Ok(pairs) }) => match compare(&alone, &pairs, known.batched == Some(true)) {
            Ok(axes) => (axes, "a request's answer is the same whichever other is beside it"),
            Err(differ) => return each(differ),
        },
        Ok(Seen { pairs: Err(fault), .. }) => {
            return each(format!("two requests can't run together: {fault}"));
        }
        Err(fault) => match named(known, &inputs, outputs).filter(|_| known.batched == Some(true)) {
            Some(axes) => (axes, "`batched` says so"),
            None => return each(format!("it can't be run with numbers that mean nothing: {fault}")),
        },
    };
    let outputs = outputs.into_iter().map(Some).collect();
    Ok(Found { axes: Some(Axes { inputs, outputs }), because: because.to_owned(), has_run })
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

/// The axes of outputs that have the batch's name.
fn named(known: &Known<'_>, axes: &[Option<usize>], outputs: &[Port]) -> Option<Vec<usize>> {
    let symbol = known.inputs.iter().zip(axes).find_map(|(port, axis)| match &port.dims[(*axis)?] {
        Dim::Symbolic(symbol) => Some(symbol.as_str()),
        Dim::Fixed(_) => None,
    })?;
    outputs.iter().map(|port| port.axis_of(symbol)).collect()
}

struct Seen {
    /// The outputs of one request.
    alone: Vec<Array>,
    pairs: Result<Pairs, String>,
}

/// The outputs of pairs of requests: the first two, either way round, and each of them with a third in the other's place.
struct Pairs {
    one_two: Vec<Array>,
    two_one: Vec<Array>,
    one_three: Vec<Array>,
    three_two: Vec<Array>,
}

/// # Errors
/// The engine can't run the model, whatever the input. What only says that these inputs won't do is inside.
fn see(
    known: &Known<'_>,
    axes: Option<&[Option<usize>]>,
    run: Run<'_>,
) -> Result<Result<Seen, String>, PipelineError> {
    let any_size = |port: &Port| port.dims.iter().any(|dim| matches!(dim, Dim::Symbolic(_)));
    let sizes = if known.inputs.iter().any(any_size) { &SIZES[..] } else { &SIZES[..1] };
    let mut said = String::new();
    for size in sizes {
        let request = |seed| numbers(known, axes, *size, seed);
        let Some(one) = request(1) else {
            said = format!("an input would have more than {ELEMENTS_MAX} elements");
            continue;
        };
        let alone = match run(one.clone()) {
            Ok(alone) => alone,
            Err(RunFault::Input(fault)) => {
                said = fault;
                continue;
            }
            Err(RunFault::Engine(error)) => return Err(error),
        };
        let (Some(axes), Some(two), Some(three)) = (axes, request(2), request(3)) else {
            return Ok(Ok(Seen { alone, pairs: Err("it has no batch".to_owned()) }));
        };
        let pair = |first: &[Array], second: &[Array]| {
            run(paired(known.inputs, axes, first, second)?).map_err(|fault| match fault {
                RunFault::Input(said) => said,
                RunFault::Engine(error) => error.to_string(),
            })
        };
        let pairs = || {
            Ok(Pairs {
                one_two: pair(&one, &two)?,
                two_one: pair(&two, &one)?,
                one_three: pair(&one, &three)?,
                three_two: pair(&three, &two)?,
            })
        };
        return Ok(Ok(Seen { alone, pairs: pairs() }));
    }
    Ok(Err(said))
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

/// The axis of each output along which a pair has two where one request has one, and what stands there is of one request alone.
fn compare(alone: &[Array], pairs: &Pairs, trusted: bool) -> Result<Vec<usize>, String> {
    let (mut axes, mut tells) = (Vec::new(), false);
    for (place, alone) in alone.iter().enumerate() {
        let Pairs { one_two, two_one, one_three, three_two } = pairs;
        let [one_two, two_one, one_three, three_two] =
            [one_two, two_one, one_three, three_two].map(|outputs| &outputs[place]);
        let (one, two) = (&alone.shape, &one_two.shape);
        let grown: Vec<usize> = (0..two.len()).filter(|axis| one.get(*axis) != two.get(*axis)).collect();
        let axis = match grown[..] {
            [axis] if one.len() == two.len() && one[axis] == 1 && two[axis] == 2 => axis,
            _ => return Err(format!("of two requests an output has the shape {two:?}, of one {one:?}")),
        };
        let same = |(array, place): (&Array, usize), (other, other_place): (&Array, usize)| match (
            array.item(axis, place),
            other.item(axis, other_place),
        ) {
            (Some(one), Some(other)) => one.shape == other.shape && are_same(&one, &other),
            _ => false,
        };
        let independent = same((one_two, 0), (one_three, 0))
            && same((one_two, 1), (three_two, 1))
            && same((one_two, 0), (two_one, 1))
            && same((one_two, 1), (two_one, 0));
        if !(trusted || independent) {
            return Err(
                "a request's answer is another with another beside it, or in another place: rows depend on each other. `batched = true` runs them together all the same"
                    .to_owned(),
            );
        }
        tells |= !same((one_two, 0), (one_two, 1));
        axes.push(axis);
    }
    if !(tells || trusted) {
        return Err("all requests of random numbers have the same answer, which says nothing. `batched = true` runs them together".to_owned());
    }
    Ok(axes)
}

fn are_same(one: &Array, other: &Array) -> bool {
    match (one.elements.to_f32(), other.elements.to_f32()) {
        (Some(one), Some(other)) => {
            let largest = one
                .iter()
                .copied()
                .filter(|value| value.is_finite())
                .fold(0.0, |most: f32, value| most.max(value.abs()));
            one.len() == other.len()
                && one.iter().zip(&other).all(|(one, other)| {
                    (one - other).abs() <= TOLERANCE * largest
                        || one.to_bits() == other.to_bits()
                        || (one.is_nan() && other.is_nan())
                })
        }
        _ => one == other,
    }
}

/// Random numbers for each input, others for each seed; `None` where they would be too many. Whole numbers of more than 8 bits are 0 and 1, which tables of
/// any size have, and begin with 1: masks that hide everything are no numbers to divide by. Where a request has one such number, lengths say, it is the seed.
fn numbers(known: &Known<'_>, axes: Option<&[Option<usize>]>, size: usize, seed: u64) -> Option<Vec<Array>> {
    let array = |(place, port): (usize, &Port)| {
        let axis = axes.and_then(|axes| axes[place]);
        // One that doesn't fit is refused later.
        let default = known
            .defaults
            .get(&port.name)
            .filter(|array| array.shape.len() + usize::from(axis.is_some()) == port.dims.len());
        if let Some(array) = default {
            let stacked = axis.map_or_else(
                || array.cast(port.datatype),
                |axis| Array::stack(&[array], axis, port.datatype),
            );
            return Some(stacked.unwrap_or_else(|_| array.clone()));
        }
        let sizes = port.dims.iter().enumerate().map(|(at, dim)| match dim {
            _ if axis == Some(at) => 1,
            Dim::Fixed(size) => *size,
            Dim::Symbolic(_) => size,
        });
        let shape: Vec<usize> = sizes.collect();
        let count = shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size))?;
        if count > ELEMENTS_MAX {
            return None;
        }
        // What is the same for all requests is the same for all seeds.
        let seed = if axis.is_some() || axes.is_none() { seed } else { 0 };
        let mut random = fastrand::Rng::with_seed(seed << 32 | place as u64);
        let is_choice = known.tables.iter().any(|table| table.input == port.name);
        let elements = match port.datatype {
            Datatype::Fp32 | Datatype::Fp64 | Datatype::Fp16 => {
                let most = seed.max(1) as f64;
                Elements::F64((0..count).map(|_| most * random.f64()).collect())
            }
            Datatype::Bytes => {
                Elements::Strings((0..count).map(|_| random.alphabetic().to_string()).collect())
            }
            Datatype::Uint8 if !is_choice => {
                Elements::I64((0..count).map(|_| random.i64(0..64 * (seed as i64 + 1).min(4))).collect())
            }
            Datatype::Int32 | Datatype::Int64 if count == 1 && seed > 0 && !is_choice => {
                Elements::I64(vec![seed as i64])
            }
            _ => Elements::I64(
                // Other requests have others, however few there are.
                (0..count)
                    .map(|index| {
                        i64::from(index == 0 || if index == 1 { seed % 2 == 1 } else { random.bool() })
                    })
                    .collect(),
            ),
        };
        let whole = Array { shape, elements };
        Some(whole.cast(port.datatype).unwrap_or(whole))
    };
    known.inputs.iter().enumerate().map(array).collect()
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
