//! From a text to the numbers of its tokens, by the model's own tokenizer.

use std::borrow::Cow;

use modalkit_sdk::PipelineError;
use tokenizers::{PostProcessor, Tokenizer, TruncationParams};

use crate::folder::Folder;

pub(crate) struct Texts {
    tokenizer: Tokenizer,
    max_tokens: usize,
    /// Tokens that the model has vectors for.
    vocabulary: u32,
    truncates: bool,
    lowers_case: bool,
}

/// A text's tokens.
#[derive(Clone, Debug)]
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
        let positions = folder.positions.unwrap_or(usize::MAX);
        if let Some(wanted) = max_tokens.filter(|wanted| *wanted > positions) {
            return Err(PipelineError::permanent(format!(
                "`max_tokens` is {wanted}; expected at most {positions}, which the model has positions for"
            )));
        }
        let of_folder = folder.max_tokens.or(folder.positions).unwrap_or(DEFAULT_MAX_TOKENS);
        let max_tokens = max_tokens.unwrap_or_else(|| of_folder.min(positions));
        let around = tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if max_tokens <= around {
            return Err(PipelineError::permanent(format!(
                "`max_tokens` is {max_tokens}; expected more than {around}, which the model puts around each text"
            )));
        }
        // One more than is kept tells a text that is too long. The file may have been saved with a fixed length, which pads every text to it.
        let truncation = TruncationParams { max_length: max_tokens + 1, ..TruncationParams::default() };
        tokenizer.with_padding(None).with_truncation(truncates.then_some(truncation)).map_err(said)?;
        let vocabulary = match folder.shape.vocab_size {
            Some(size) => size,
            None => u32::try_from(tokenizer.get_vocab_size(true))?,
        };
        Ok(Self { tokenizer, max_tokens, vocabulary, truncates, lowers_case: folder.lowers_case })
    }

    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Encoded, String> {
        let text = if self.lowers_case { Cow::from(text.to_lowercase()) } else { Cow::from(text) };
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| format!("it can't be made tokens: {error}"))?;
        let (mut tokens, mut types) = (encoding.get_ids().to_vec(), encoding.get_type_ids().to_vec());
        let truncated = self.truncates && tokens.len() > self.max_tokens;
        if truncated {
            // The text's last token goes, and what the model puts behind it stays.
            let last = encoding.get_special_tokens_mask().iter().rposition(|special| *special == 0);
            let last = last.unwrap_or(tokens.len() - 1);
            tokens.remove(last);
            types.remove(last);
        }
        self.fitting(Encoded { tokens, types, truncated })
    }

    /// Tokens that a caller made, as they are.
    pub(crate) fn take(&self, tokens: &[u32]) -> Result<Encoded, String> {
        self.fitting(Encoded { tokens: tokens.to_vec(), types: vec![0; tokens.len()], truncated: false })
    }

    fn fitting(&self, encoded: Encoded) -> Result<Encoded, String> {
        if let Some(unknown) = encoded.tokens.iter().find(|token| **token >= self.vocabulary) {
            return Err(format!("expected tokens from 0 to {}, found {unknown}", self.vocabulary - 1));
        }
        match encoded.tokens.len() {
            0 => Err("expected at least one token, found none".to_owned()),
            found if found > self.max_tokens => {
                let help = match self.truncates {
                    true => "lists of tokens are not cut, texts are",
                    false => "`truncate = true` in the model's entry cuts longer texts",
                };
                Err(format!("expected at most {} tokens, found {found}; {help}", self.max_tokens))
            }
            _ => Ok(encoded),
        }
    }
}

/// The tokenizer's file.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Where nothing in the folder says how many there may be.
const DEFAULT_MAX_TOKENS: usize = 512;
