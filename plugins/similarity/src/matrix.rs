//! An embedding matrix, and how it is read from a file: `.npy` and `.safetensors`, of 16, 32 or 64 bit floats. What is no matrix of
//! finite numbers is refused in words.

use std::{fs, io::BufReader, path::Path};

use modalkit_sdk::PipelineError;
use npyz::{
    DType, NpyFile, Order,
    half::{bf16, f16},
};
use safetensors::{Dtype, SafeTensors};

/// Rows of the same width, one after the other.
pub struct Matrix {
    values: Vec<f32>,
    width: usize,
}

impl Matrix {
    /// Makes one of its values.
    ///
    /// # Errors
    /// There are none, or not a whole number of rows, or not all of them are finite.
    pub fn new(values: Vec<f32>, width: usize) -> Result<Self, PipelineError> {
        if width == 0 || values.is_empty() || !values.len().is_multiple_of(width) {
            return Err(PipelineError::permanent(format!(
                "expected rows of at least one number each, found {} numbers in rows of {width}",
                values.len()
            )));
        }
        if let Some(place) = values.iter().position(|number| !number.is_finite()) {
            return Err(PipelineError::permanent(format!(
                "expected finite numbers of 32 bits, found {} in row {}, column {}",
                values[place],
                place / width,
                place % width
            )));
        }
        Ok(Self { values, width })
    }

    /// Reads one, by its file's extension.
    ///
    /// # Errors
    /// The file can't be read, or holds no matrix.
    pub fn read(path: &Path, tensor: Option<&str>) -> Result<Self, PipelineError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npy") => Self::from_npy(path),
            Some("safetensors") => Self::from_safetensors(&fs::read(path)?, tensor),
            _ => Err(PipelineError::permanent("expected a file that ends with .npy or .safetensors")),
        }
    }

    fn from_npy(path: &Path) -> Result<Self, PipelineError> {
        let file = NpyFile::new(BufReader::new(fs::File::open(path)?))?;
        let &[_, width] = file.shape() else {
            return Err(PipelineError::permanent(format!(
                "expected a matrix, rows by columns, found the shape {:?}",
                file.shape()
            )));
        };
        if file.order() != Order::C {
            return Err(PipelineError::permanent(
                "expected rows one after the other (C order), found columns: numpy.ascontiguousarray makes it so",
            ));
        }
        let DType::Plain(kind) = file.dtype() else {
            return Err(PipelineError::permanent("expected numbers, found records"));
        };
        let width = usize::try_from(width)?;
        let values = match (kind.type_char(), kind.size_field()) {
            (npyz::TypeChar::Float, 4) => file.into_vec::<f32>()?,
            (npyz::TypeChar::Float, 8) => {
                file.into_vec::<f64>()?.into_iter().map(|number| number as f32).collect()
            }
            (npyz::TypeChar::Float, 2) => file.into_vec::<f16>()?.into_iter().map(f16::to_f32).collect(),
            _ => {
                return Err(PipelineError::permanent(format!(
                    "expected floats of 16, 32 or 64 bits, found {kind}"
                )));
            }
        };
        Self::new(values, width)
    }

    fn from_safetensors(bytes: &[u8], tensor: Option<&str>) -> Result<Self, PipelineError> {
        let tensors = SafeTensors::deserialize(bytes)?;
        let names = tensors.names().join(", ");
        let (name, view) = match (tensor, tensors.tensors().as_slice()) {
            (Some(name), _) => {
                let view = tensors.tensor(name).map_err(|_| {
                    PipelineError::permanent(format!("expected the tensor {name:?}, found {names}"))
                })?;
                (name.to_owned(), view)
            }
            (None, [(name, _)]) => (name.clone(), tensors.tensor(name)?),
            (None, _) => {
                return Err(PipelineError::permanent(format!(
                    "name one of its tensors with `tensor`: {names}"
                )));
            }
        };
        let &[_, width] = view.shape() else {
            return Err(PipelineError::permanent(format!(
                "expected a matrix, rows by columns, found {name} with the shape {:?}",
                view.shape()
            )));
        };
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => words(data, f32::from_le_bytes),
            Dtype::F64 => words(data, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::F16 => words(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => words(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            other => {
                return Err(PipelineError::permanent(format!(
                    "expected floats of 16, 32 or 64 bits, found {name} of {other:?}"
                )));
            }
        };
        Self::new(values, width)
    }

    /// How many rows it has.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    /// How many columns it has.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// All numbers, row after row.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Makes every row as long as 1.
    pub fn normalise(&mut self) {
        self.values.chunks_exact_mut(self.width).for_each(normalise);
    }
}

fn words<const BYTES: usize>(data: &[u8], read: impl Fn([u8; BYTES]) -> f32) -> Vec<f32> {
    let (words, _) = data.as_chunks::<BYTES>();
    words.iter().map(|word| read(*word)).collect()
}

/// Makes a vector as long as 1; one of zeros stays as it is.
pub fn normalise(vector: &mut [f32]) {
    // In 64 bits, in which no square of 32 bits overflows.
    let length = vector.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    const NUMBERS: [f32; 6] = [1.0, -2.5, 0.25, 4096.0, -0.5, 3.0];

    fn npy(kind: &str, fortran: &str, data: &[u8]) -> Result<Matrix, PipelineError> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': (2, 3), }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        let file = tempfile::Builder::new().suffix(".npy").tempfile().unwrap();
        fs::write(file.path(), bytes).unwrap();
        Matrix::read(file.path(), None)
    }

    fn bytes<const BYTES: usize>(write: impl Fn(f32) -> [u8; BYTES]) -> Vec<u8> {
        NUMBERS.into_iter().flat_map(write).collect()
    }

    #[test]
    fn floats_of_every_width_are_read() {
        let doubles = bytes(|number| f64::from(number).to_le_bytes());
        let halves = bytes(|number| f16::from_f32(number).to_le_bytes());
        let brains = bytes(|number| bf16::from_f32(number).to_le_bytes());
        let singles = bytes(f32::to_le_bytes);
        let from_npy = [("<f4", &singles), ("<f8", &doubles), ("<f2", &halves)];
        for (kind, data) in from_npy {
            let matrix = npy(kind, "False", data).unwrap();
            assert_eq!((matrix.values(), matrix.width()), (&NUMBERS[..], 3), "{kind}");
        }
        let big_end = bytes(f32::to_be_bytes);
        assert_eq!(npy(">f4", "False", &big_end).unwrap().values(), NUMBERS);
        for (kind, data) in
            [(Dtype::F32, &singles), (Dtype::F64, &doubles), (Dtype::F16, &halves), (Dtype::BF16, &brains)]
        {
            let view = TensorView::new(kind, vec![2, 3], data).unwrap();
            let file = safetensors::serialize([("rows", view)], None).unwrap();
            assert_eq!(Matrix::from_safetensors(&file, None).unwrap().values(), NUMBERS, "{kind:?}");
        }
    }

    #[test]
    fn what_is_no_matrix_of_numbers_says_what_it_is() {
        let singles = bytes(f32::to_le_bytes);
        let said = |matrix: Result<Matrix, PipelineError>| matrix.err().unwrap().to_string();
        assert!(said(npy("<f4", "True", &singles)).contains("C order"));
        assert!(said(npy("<i4", "False", &singles)).contains("expected floats of 16, 32 or 64 bits"));
        assert!(said(npy("<f8", "False", &[0xff; 48])).contains("found NaN in row 0, column 0"));
        let huge: Vec<u8> = [1e300f64; 6].into_iter().flat_map(f64::to_le_bytes).collect();
        assert!(said(npy("<f8", "False", &huge)).contains("found inf"), "more than 32 bits hold");
    }
}
