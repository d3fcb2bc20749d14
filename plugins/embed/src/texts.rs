//! From a text to the numbers of its tokens, by the model's own tokenizer.

use modalkit_sdk::PipelineError;
use tokenizers::{Tokenizer, TruncationParams};

use crate::folder::Folder;

pub(crate) struct Texts {
    tokenizer: Tokenizer,
    max_tokens: usize,
    vocabulary: u32,
}

/// A text's tokens.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) tokens: Vec<u32>,
    pub(crate) types: Vec<u32>,
    /// Whether its end was left out.
    pub(crate) truncated: bool,
}

impl Texts {
    /// `truncates`: longer texts are cut, and not refused.
    pub(crate) fn open(
        folder: &Folder,
        max_tokens: Option<usize>,
        truncates: bool,
    ) -> Result<Self, PipelineError> {
        let path = folder.path.join(TOKENIZER);
        let said = |error| PipelineError::permanent(format!("{TOKENIZER}: {error}"));
        let mut tokenizer = Tokenizer::from_file(&path).map_err(said)?;
        if let (Some(wanted), Some(most)) = (max_tokens, folder.positions)
            && wanted > most
        {
            return Err(PipelineError::permanent(format!(
                "`max_tokens` is {wanted}; expected at most {most}, which the model has positions for"
            )));
        }
        let max_tokens = max_tokens.or(folder.max_tokens).or(folder.positions).unwrap_or(DEFAULT_MAX_TOKENS);
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        // The file may have been saved with a fixed length, which pads every text to it.
        tokenizer.with_padding(None).with_truncation(truncates.then_some(truncation)).map_err(said)?;
        let vocabulary = u32::try_from(tokenizer.get_vocab_size(true))?;
        Ok(Self { tokenizer, max_tokens, vocabulary })
    }

    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Encoded, String> {
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| format!("it can't be made tokens: {error}"))?;
        let (tokens, types) = (encoding.get_ids().to_vec(), encoding.get_type_ids().to_vec());
        self.fitting(Encoded { tokens, types, truncated: !encoding.get_overflowing().is_empty() })
    }

    /// Tokens that a caller made, as they are.
    pub(crate) fn take(&self, tokens: &[u32]) -> Result<Encoded, String> {
        if let Some(unknown) = tokens.iter().find(|token| **token >= self.vocabulary) {
            return Err(format!("expected tokens from 0 to {}, found {unknown}", self.vocabulary - 1));
        }
        self.fitting(Encoded { tokens: tokens.to_vec(), types: vec![0; tokens.len()], truncated: false })
    }

    fn fitting(&self, encoded: Encoded) -> Result<Encoded, String> {
        match encoded.tokens.len() {
            0 => Err("expected at least one token, found none".to_owned()),
            found if found > self.max_tokens => Err(format!(
                "expected at most {} tokens, found {found}; `truncate = true` in the model's entry cuts longer texts",
                self.max_tokens
            )),
            _ => Ok(encoded),
        }
    }
}

/// The tokenizer's file.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Where nothing in the folder says how many there may be.
const DEFAULT_MAX_TOKENS: usize = 512;
